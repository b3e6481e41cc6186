"""`kvtier replay`: a recorded trace through the pager's policies, with a virtual clock. Start reading at `simulate`."""
