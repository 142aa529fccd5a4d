"""What is raised where an image cannot be read, for those who read images and for those who only pass them on."""


class BadImage(Exception):
    """Bytes that cannot be decoded. `status` is "empty", "not an image", "truncated", "too large" or "decode error"."""

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
