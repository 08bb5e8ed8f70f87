"""The key that a put returns."""


class Key(str):
    """A key as any other, and how many rows of its sequence are its parent's."""

    continued_rows: int

    def __new__(cls, text: str, continued_rows: int = 0) -> "Key":
        """Return the key ``text``."""
        key = super().__new__(cls, text)
        key.continued_rows = continued_rows
        return key

    def __reduce__(self) -> tuple[type["Key"], tuple[str, int]]:
        """Let pickle make it anew."""
        return Key, (str(self), self.continued_rows)
