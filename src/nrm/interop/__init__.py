"""nrm behind the interfaces of other libraries; each needs that library installed."""
