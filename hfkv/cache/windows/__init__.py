"""Windows: what stays of the tokens that leave one, and where it stands."""
