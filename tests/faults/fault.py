"""A planted fault: one small edit of a source file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Fault:
    """An edit after which training goes on and is wrong.

    Attributes:
        name: Short, unique, of lower-case words with hyphens.
        file: Below `megatron_mimo/`.
        old: Text that occurs exactly once in the file.
        new: What takes its place.
        why: What is then wrong, and on which layouts it can be seen.
    """

    name: str
    file: str
    old: str
    new: str
    why: str

    @property
    def path(self) -> Path:
        """The file, from the root of the repository."""
        return Path("megatron_mimo") / self.file

    def edited(self, source: str) -> str:
        """The file's text with the fault in it.

        Args:
            source: The file's text.

        Raises:
            ValueError: `old` does not occur exactly once.
        """
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"fault {self.name}: its old text occurs {count} times in {self.path}, expected "
                f"once: bring the fault in tests/faults/table up to date with the file"
            )
        return source.replace(self.old, self.new)
