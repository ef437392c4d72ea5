"""Where rows come from: every kind of input file, as rows that keep what they hold."""
