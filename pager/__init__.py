"""What lives where and what moves. Import the module you need; this file loads nothing."""
