"""What a job would take, by arithmetic alone: `mindspeed-nsa plan`. docs/plan.md has the formulas."""
