"""What people run. Stands on public surfaces only; this file loads nothing."""
