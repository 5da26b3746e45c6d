"""What leaves Tunesmith: verification of what was saved, merging, looking into files."""
