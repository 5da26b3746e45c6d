"""The web page: chat, models side by side, runs, and a form that previews data and starts a run."""
