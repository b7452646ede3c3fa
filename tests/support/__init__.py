"""What tests share: fakes, contracts, processes, certificates."""
