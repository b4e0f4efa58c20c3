"""How training scales over processes."""
