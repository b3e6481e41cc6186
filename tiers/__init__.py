"""Where a block can live. Import the module you need; this file loads nothing."""
