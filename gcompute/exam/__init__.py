"""An exam for the planner: published problems with published answers, each solved by public functions alone."""
