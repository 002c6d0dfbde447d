"""PAC and what it traces."""
