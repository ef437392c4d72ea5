"""Results beside their input rows, in input order, in files that appear whole or not at all."""
