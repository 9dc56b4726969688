"""One module for each group of pages. A module knows HTTP and the room that does the work, not the other pages."""
