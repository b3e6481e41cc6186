"""What a pager tells of itself: rings of decisions, look-ups and requests, and views of its books as plain values."""
