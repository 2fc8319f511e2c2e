"""What a run is told: settings, recipes, options of rules, and the schedule of the learning rate."""
