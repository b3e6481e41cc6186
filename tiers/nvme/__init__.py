"""kvtier.tiers.nvme"""
