"""Jobs that keep a published ensemble true, or say why they left it as it was."""
