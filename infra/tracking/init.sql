CREATE DATABASE optuna OWNER prunefield;
