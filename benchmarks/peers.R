# One peer on one problem: Rscript peers.R PACKAGE FOLDER FAMILY
#
# FOLDER holds y.bin, names.txt (of the fields) and a covariance matrix NAME.bin for each (doubles, n x n). The kernels are handed
# over: lme4 and glmmTMB get the Cholesky factor L of each as the design matrix of an independent effect (eta = L z), spaMM the
# matrix itself. Prints "seconds", "cpu" and the estimates, one "name value" a line, and writes the summed field to field.bin.
# Maxima of the likelihood by the Laplace approximation; for a gaussian response exact.

arguments <- commandArgs(trailingOnly = TRUE)
package <- arguments[1]; folder <- arguments[2]; family <- arguments[3]
suppressPackageStartupMessages(suppressWarnings({library(Matrix); library(package, character.only = TRUE)}))

read <- function(name) {
  path <- file.path(folder, paste0(name, ".bin"))
  readBin(path, "double", file.size(path) / 8)
}
y <- read("y"); n <- length(y)
fields <- readLines(file.path(folder, "names.txt"))
covariance <- lapply(setNames(fields, fields), function(name) matrix(read(name), n, n))
data <- data.frame(y = y)
for (name in fields) data[[name]] <- factor(seq_len(n))
response <- if (family == "bernoulli") binomial() else gaussian()
say <- function(name, value) cat(name, format(value, digits = 12), "\n")

roots <- function() lapply(covariance, function(k) t(chol(k + diag(1e-9, n))))
formula <- as.formula(paste("y ~ 1 +", paste0("(1 | ", fields, ")", collapse = " + ")))

fit_lme4 <- function() {
  root <- roots()
  unchecked <- list(check.nobs.vs.nlev = "ignore", check.nobs.vs.nRE = "ignore", check.nobs.vs.rankZ = "ignore")
  control <- do.call(if (family == "bernoulli") glmerControl else lmerControl, unchecked)
  parse <- if (family == "bernoulli") glFormula else lFormula
  extra <- if (family == "bernoulli") list(family = response) else list(REML = FALSE)
  parts <- do.call(parse, c(list(formula, data = data, control = control), extra))
  order <- names(parts$reTrms$cnms)
  parts$reTrms$Zt <- as(as(do.call(rbind, lapply(root[order], t)), "CsparseMatrix"), "generalMatrix")
  if (family == "bernoulli") {
    deviance <- do.call(mkGlmerDevfun, parts)
    best <- optimizeGlmer(deviance)
    deviance <- updateGlmerDevfun(deviance, parts$reTrms)
    best <- optimizeGlmer(deviance, stage = 2)
  } else {
    deviance <- do.call(mkLmerDevfun, parts)
    best <- optimizeLmer(deviance)
  }
  code <- if (is.null(best$conv)) best$convergence else best$conv
  say("converged", as.numeric(length(code) == 0 || all(code == 0)))
  model <- mkMerMod(environment(deviance), best, parts$reTrms, fr = parts$fr)
  scale <- if (family == "bernoulli") 1 else sigma(model)^2
  theta <- getME(model, "theta")
  for (i in seq_along(order)) say(paste0("variance_", order[i]), scale * theta[[i]]^2)
  if (family != "bernoulli") say("variance_residual", scale)
  as.vector(crossprod(getME(model, "Zt"), getME(model, "b")))
}

fit_glmmTMB <- function() {
  root <- roots()
  parts <- glmmTMB(formula, data = data, family = response, doFit = FALSE)
  order <- names(parts$condList$reTrms$cnms)
  parts$data.tmb$Z <- as(as(do.call(cbind, root[order]), "TsparseMatrix"), "generalMatrix")
  model <- fitTMB(parts)
  say("converged", as.numeric(model$fit$convergence == 0 && isTRUE(model$sdr$pdHess)))
  at <- model$fit$par
  spread <- sqrt(diag(model$sdr$cov.fixed))
  theta <- which(names(at) == "theta")  # log sd
  for (i in seq_along(order)) {
    variance <- exp(2 * at[theta[i]])
    say(paste0("variance_", order[i]), variance)
    say(paste0("variance_", order[i], "_sd"), 2 * variance * spread[theta[i]])
  }
  if (family != "bernoulli") say("variance_residual", sigma(model)^2)
  b <- model$fit$parfull[names(model$fit$parfull) == "b"]
  as.vector(parts$data.tmb$Z %*% b)
}

fit_spaMM <- function() {
  named <- lapply(covariance, function(k) {dimnames(k) <- list(seq_len(n), seq_len(n)); k})
  formula <- as.formula(paste("y ~ 1 +", paste0("corrMatrix(1 | ", fields, ")", collapse = " + ")))
  structures <- setNames(unname(named), rep("corrMatrix", length(fields)))
  model <- fitme(formula, data = data, family = response, covStruct = structures, method = "ML")
  say("converged", as.numeric(length(model$warnings) == 0))
  variance <- get_ranPars(model, which = "lambda")
  for (i in seq_along(fields)) say(paste0("variance_", fields[i]), variance[[i]])
  if (family != "bernoulli") say("variance_residual", residVar(model, which = "fit"))
  as.vector(predict(model, type = "link")) - fixef(model)[[1]]
}

begin <- proc.time()
field <- switch(package, lme4 = fit_lme4(), glmmTMB = fit_glmmTMB(), spaMM = fit_spaMM())
took <- proc.time() - begin
say("seconds", took[["elapsed"]])
say("cpu_seconds", took[["user.self"]] + took[["sys.self"]])
writeBin(field, file.path(folder, "field.bin"))
