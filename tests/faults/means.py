"""The faults of the mean of keys."""

from __future__ import annotations

from tests.faults.fault import Fault

MEANS = (
    Fault(
        "new keys are centred as if no row had padding",
        "hfkv/cache/turns.py",
        "tuple([first - origin for origin in origins])",
        "tuple([first for _ in origins])",
        ("unit/test_centring.py",),
    ),
    Fault(
        "the mean of decoded keys is left out",
        "hfkv/cache/snapshot.py",
        "return keys.add_(mean.turned(self.first + first, end)).to(dtype)",
        "return keys.to(dtype)",
        ("model/test_key_mean.py",),
    ),
    Fault(
        "shared prefixes are found under other means",
        "patches/handle.py",
        "if digests else self.kv.reuse.salt)",
        'if digests == "" else self.kv.reuse.salt)',
        ("unit/test_centring.py",),
    ),
    Fault(
        "a row that has begun is moved",
        "patches/keys/means.py",
        "if before and (padding.began is None or max(padding.began, default=0) < before):",
        "if before and padding.began is not None and max(padding.began, default=0) < before:",
        ("model/test_key_mean_rows.py",),
    ),
)
