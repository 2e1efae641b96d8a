"""Reports of a store: metrics, tables, pictures, Markdown and HTML."""
