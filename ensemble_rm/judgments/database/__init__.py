"""The database of the judgment store: engines, tables, queries and writes."""
