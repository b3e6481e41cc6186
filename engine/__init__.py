"""Who uses the pager: models, sequences, sessions. Import the module you need; this file loads nothing."""
