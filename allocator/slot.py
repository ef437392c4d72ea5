"""One sequence's place in an arena."""

from dataclasses import dataclass

from batchrun.allocator.vmm import AllocatorError, Handle


@dataclass(slots=True)
class Slot:
    """One sequence's place. Open while `backed` is not -1, kept while `kept` is not 0."""

    index: int
    tables: list[list[Handle]]  # per group, the mapped pages from the start of the slab
    claimed: tuple[int, ...]  # per group, pages that may be in use; at most len(table)
    aliased: tuple[int, ...]  # per group, leading pages that may have other references
    backed: int = -1  # tokens that the claimed pages hold; -1 when closed
    tokens: int = 0  # live tokens
    kept: int = 0  # tokens that a closed slot keeps
    fence: int = -1  # the surplus may be read until this step is retired
    num_pages: int = 0
    num_claimed: int = 0
    aliased_end: int = 0  # tokens that have bytes on the aliased pages
    counted: tuple[tuple[int, ...], ...] = ()  # aliased pages counted by `Sharing`, per group

    @property
    def lengths(self) -> tuple[int, ...]:
        """Mapped pages per group."""
        return tuple(map(len, self.tables))

    @property
    def surplus(self) -> int:
        """Pages that are mapped but not claimed."""
        return self.num_pages - self.num_claimed

    @property
    def unaliased_surplus(self) -> int:
        """Surplus past the aliased pages, which no other slot has."""
        if not self.aliased_end:
            return self.surplus
        pages = zip(self.tables, self.claimed, self.aliased, strict=True)
        return sum(len(table) - max(claimed, aliased) for table, claimed, aliased in pages)

    def check_open(self) -> None:
        """Raise AllocatorError unless the slot is open."""
        if self.backed < 0:
            raise AllocatorError(f"slot {self.index} is not open")
