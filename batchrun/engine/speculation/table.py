"""Draft tokens from the other rows of a job: what followed what in their answers.

Rows of one job are asked alike, so their answers have words, keys and turns of phrase in common
(SuffixDecoding, Oliaro et al., arXiv 2411.04975, keeps past answers in a suffix tree). Here the
last tokens, at three lengths, lead to the token that followed them most reliably so far, in a table
of fixed size that forgets what is seldom seen: the tagged tables of branch predictors (TAGE, Seznec
and Michaud, JILP 2006).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq

LENGTHS = (4, 2, 1)  # of the contexts, in tokens, the strongest sign first
LONGEST_CONTEXT = LENGTHS[0]
_MOST_HITS = 31
_BITS = 20

Found = tuple[int, int, int]
"""A token, the length of the context that it followed, and how sure that is, from 1 to 5."""


class AnswerTable:
    """What followed the last tokens in the answers of a job, and how surely.

    Args:
        bits: The table has two to this power of entries.
    """

    def __init__(self, bits: int = _BITS) -> None:
        self._mask = (1 << bits) - 1
        # By a context's hash: the rest of the hash, the token that followed, and how reliably.
        self._tags = array("I", bytes(4 << bits))
        self._tokens = array("i", bytes(4 << bits))
        self._hits = bytearray(1 << bits)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, however long the job."""
        return len(self._hits) * (self._tags.itemsize + self._tokens.itemsize + 1)

    def learn(self, namespace: int, token_ids: Seq[int], begin: int) -> None:
        """Note what tokens of an answer followed.

        Args:
            namespace: Of rows that may use each other's tokens.
            token_ids: The tokens, with some of those before them.
            begin: The first one to learn.
        """
        mask, tags, tokens, hits = self._mask, self._tags, self._tokens, self._hits
        for end in range(max(begin, 1), len(token_ids)):
            token = token_ids[end]
            for length in LENGTHS:
                if length > end:
                    continue
                key = hash((namespace, *token_ids[end - length : end]))
                at, tag = key & mask, key >> 32 & 0xFFFFFFFF
                count = hits[at]
                if tags[at] == tag and tokens[at] == token:
                    hits[at] = min(count + 1, _MOST_HITS)
                elif count > 1:  # what is there must fail, or be in the way, again and again
                    hits[at] = count >> 1
                else:
                    tags[at], tokens[at], hits[at] = tag, token, 1

    def find(self, namespace: int, last: Seq[int]) -> list[Found]:
        """What may follow the last tokens, of which there are at most `LONGEST_CONTEXT`."""
        mask, tags, hits = self._mask, self._tags, self._hits
        found = []
        for length in LENGTHS:
            if length <= len(last):
                key = hash((namespace, *last[-length:]))
                at = key & mask
                if tags[at] == key >> 32 & 0xFFFFFFFF and hits[at]:
                    found.append((self._tokens[at], length, hits[at].bit_length()))
        return found
