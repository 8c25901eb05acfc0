"""Commands that stand on one another, from one file: run in order, each once, and put into tables at the end."""
