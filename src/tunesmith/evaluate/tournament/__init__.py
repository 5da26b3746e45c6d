"""Tournaments: judgments of pairs of answers, and what follows from them: Elo, Bradley-Terry, % of a reference."""
