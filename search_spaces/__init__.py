"""What may be chosen, and exactly what it weighs: units, menus, operators, presets, bytes."""
