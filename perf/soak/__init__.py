"""Work for a long time: `steady`, where nothing may grow, and with `faults`, where nothing may get lost."""
