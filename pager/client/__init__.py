"""The client's side of pagerd: connections, and the tier that a pager has below it."""
