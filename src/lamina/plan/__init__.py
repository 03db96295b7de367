"""Know before you buy: hardware, model costs, workloads. Pure; no torch."""
