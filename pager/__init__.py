"""kvtier.pager"""
