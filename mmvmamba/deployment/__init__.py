"""Networks for other programs: exported, checked, quantised."""
