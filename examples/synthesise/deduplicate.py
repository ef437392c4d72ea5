"""Writes one of equal questions, whatever their topic and case, to questions.parquet."""

import pyarrow.compute as pc
import pyarrow.parquet as pq

samples = pq.read_table("samples.parquet")
complete = samples.filter(pc.equal(samples["finish_reason"], "stop"))
seen: set[str] = set()
kept = []
for index, question in enumerate(complete["completion"].to_pylist()):
    if question.casefold() not in seen:
        seen.add(question.casefold())
        kept.append(index)
questions = complete.take(kept).select(["topic", "completion"])
pq.write_table(questions.rename_columns(["topic", "question"]), "questions.parquet")
print(f"{questions.num_rows} different questions in {samples.num_rows} samples")
