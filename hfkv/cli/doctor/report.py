"""`DoctorReport`: what the doctor found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hfkv.cli.doctor.layers import ModelReport
from hfkv.cli.doctor.machine import Item

if TYPE_CHECKING:
    from hfkv.kernels.selftest.suite import Check


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found.

    Attributes:
        installed: packages, compiler, processor, GPUs.
        model: which kernels its layers would use.
        device, dtype: device and dtype of queries and tokens.
        checks: the self-test's.
        seconds: duration of the self-test.
    """

    installed: list[Item]
    model: ModelReport
    device: str
    dtype: str
    checks: list[Check]
    seconds: float

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.is_failure]

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "is_right": not self.failures,
            "device": self.device,
            "dtype": self.dtype,
            "seconds": self.seconds,
            "installed": [asdict(item) for item in self.installed],
            "model": {
                **asdict(self.model),
                "groups": [
                    {**asdict(group), "heads": group.heads and group.heads._asdict()} for group in self.model.groups
                ],
            },
            "checks": [{**asdict(check), "heads": check.heads and check.heads._asdict()} for check in self.checks],
        }
