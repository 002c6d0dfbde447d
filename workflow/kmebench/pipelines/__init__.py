"""Running editors over many requests, and over one."""
