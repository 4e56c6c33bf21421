# Makes sleepstudy.json: Rscript sleepstudy.R > sleepstudy.json; lme4 1.1.31, data of Belenky et al. (2003) as lme4 ships them.
library(lme4)
d <- sleepstudy
d$centered <- d$Days - mean(d$Days)
out <- list()
for (x in c("Days", "centered")) for (reml in c(TRUE, FALSE)) {
  f <- lmer(as.formula(sprintf("Reaction ~ %s + (%s | Subject)", x, x)), d, REML = reml)
  v <- as.data.frame(VarCorr(f))
  out[[paste0(x, if (reml) "_reml" else "_ml")]] <- c(sd = v$sdcor[1], slope = v$sdcor[2], correlation = v$sdcor[3], residual = v$sdcor[4], loglik = as.numeric(logLik(f)), b0 = fixef(f)[[1]], b1 = fixef(f)[[2]])
}
cat(sprintf('{"reaction": [%s],\n "days": [%s],\n "subject": [%s],\n "lme4": {\n', paste(d$Reaction, collapse=", "), paste(d$Days, collapse=", "), paste(as.integer(d$Subject) - 1L, collapse=", ")))
cat(paste(sapply(names(out), function(n) sprintf('  "%s": {%s}', n, paste(sprintf('"%s": %.10g', names(out[[n]]), out[[n]]), collapse=", "))), collapse=",\n"))
cat("\n }}\n")
