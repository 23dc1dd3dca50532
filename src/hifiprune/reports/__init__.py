"""Model cards and the HTML report."""
