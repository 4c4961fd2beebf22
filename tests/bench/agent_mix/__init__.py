"""The coverage of a mixed agent workload: the mix, and how it is sent and read back."""
