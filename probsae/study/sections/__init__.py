"""The report's pictures, each with what the study found and what this run finds."""
