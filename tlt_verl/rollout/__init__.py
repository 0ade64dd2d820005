"""verl's side: replica, server, weight adapter, step metrics."""
