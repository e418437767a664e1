"""One thin KFP shell per stage: it takes paths and parameters, calls the stage, hands its outputs on."""
