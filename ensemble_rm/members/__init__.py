"""Text → score columns; the one room where models live."""
