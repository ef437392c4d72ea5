"""What all results of a job have in common: tallies, quantiles, histograms, and some to look at."""

from __future__ import annotations

from collections.abc import Sequence

from batchrun.jobs.journal.readings import Readings

_ANSWERED = "status = 'ok' AND typeof({}) = 'integer'"
_MEASURED = {  # what is measured of results, and of which of them
    **{name: f"typeof({name}) = 'real'" for name in ("queue_s", "prefill_s", "decode_s")},
    **{name: _ANSWERED.format(name) for name in ("prompt_tokens", "completion_tokens")},
}


class Overview(Readings):
    """Sums up an open journal."""

    def tally(self, column: str) -> dict[str, int]:
        """Samples by `finish_reason` or rows by `error_kind`, most frequent first."""
        what = {"finish_reason": "*", "error_kind": f"DISTINCT id / {self.n}"}[column]
        return dict(
            self._all(
                f"SELECT {column}, count({what}) FROM results "
                f"WHERE typeof({column}) = 'text' GROUP BY 1 ORDER BY 2 DESC, 1"
            )
        )

    def quantiles(self, column: str, shares: Sequence[float]) -> list[float] | None:
        """Quantiles (nearest rank) of a column of `_MEASURED`; None if it is empty."""
        measured = f"FROM results WHERE {_MEASURED[column]}"
        [(count,)] = self._all(f"SELECT count(*) {measured}")
        if not count:
            return None
        ranks = [min(count - 1, int(share * count)) for share in shares]
        ranked = f"row_number() OVER (ORDER BY {column}) - 1 AS rank"
        found = dict(
            self._all(
                f"SELECT rank, {column} FROM (SELECT {column}, {ranked} {measured}) "
                f"WHERE rank IN ({', '.join(map(str, ranks))})"
            )
        )
        return [found[rank] for rank in ranks]

    def histogram(self, column: str, bars: int) -> tuple[int, int, list[int]] | None:
        """How many answers have how many tokens.

        Args:
            column: `prompt_tokens` or `completion_tokens`.
            bars: The most that is returned.

        Returns:
            The least, how many lengths a bar covers, and the answers in each bar; None if there is
            no answer.
        """
        measured = f"FROM results WHERE {_MEASURED[column]}"
        [(least, most)] = self._all(f"SELECT min({column}), max({column}) {measured}")
        if least is None:
            return None
        width = -(-(most - least + 1) // bars)
        found = dict(
            self._all(f"SELECT ({column} - ?1) / ?2, count(*) {measured} GROUP BY 1", least, width)
        )
        return least, width, [found.get(bar, 0) for bar in range((most - least) // width + 1)]

    def answered(self, count: int) -> list[int]:
        """Rows with an answer, spread evenly over the job, in order, each once."""
        [(last,)] = self._all("SELECT ifnull(max(id), -1) FROM results")
        query = "SELECT id FROM results WHERE status = 'ok' AND id >= ? ORDER BY id LIMIT 1"
        begins = [(last + 1) * i // count for i in range(count)]
        found = (number for begin in begins for (number,) in self._all(query, begin))
        return list(dict.fromkeys(number // self.n for number in found))

    def failing(self, count: int) -> dict[str, list[int]]:
        """The first rows that failed for each reason, `count` at most, in order."""
        ranked = "row_number() OVER (PARTITION BY error_kind ORDER BY min(id)) AS place"
        found: dict[str, list[int]] = {}
        for kind, row in self._all(
            f"SELECT error_kind, row FROM (SELECT error_kind, id / ?1 AS row, {ranked} "
            "FROM results WHERE status = 'error' AND typeof(error_kind) = 'text' GROUP BY 1, 2) "
            "WHERE place <= ?2 ORDER BY row",
            *(self.n, count),
        ):
            found.setdefault(kind, []).append(row)
        return found
