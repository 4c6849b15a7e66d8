"""How well ensembles predict preferences, against peers."""
