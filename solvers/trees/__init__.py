"""The engine that proves: branch and bound over dense components, tables of components under one budget."""
