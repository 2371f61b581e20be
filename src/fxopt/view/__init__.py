"""A program's history as one HTML file: see `page.write`."""
