"""Being here puts this folder on the path: ``operators/`` uses ``operator_cases`` too."""
