"""One module for each group of pages. Knows HTTP and the room that does the work; not the other pages."""
